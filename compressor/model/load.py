"""Find a model wherever it is, and load it whole with its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import AccessError, ModelError, ResourceError
from compressor.model.architecture import Architecture
from compressor.model.configuration import attention_implementation
from compressor.model.files import read_config, weight_files
from compressor.model.serving import SERVING
from compressor.resources import builtin_model

if TYPE_CHECKING:
    import torch

__all__ = ["ModelSource", "load_model", "load_tokenizer", "read_config", "read_licence", "resolve"]

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_CONFIG = ("config.json", "README.md")  # the card states the licence
_TOKENIZER = ("tokenizer*", "vocab.*")
_FILES = (
    *_CONFIG,
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    *_TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
)
# Other copies of the same weights: subfolders hold exports, Mistral adds `consolidated`.
_NOT = ("*/*", "consolidated*")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        path: directory with `config.json` and, unless only that was asked for, safetensors.
        id: what the user called it, without the revision.
        revision: commit on the Hub; None for a local or built-in model.
    """

    path: Path
    id: str
    revision: str | None


def resolve(model: str, *, config_only: bool = False) -> ModelSource:
    """Find `builtin:<name>`, a local directory, or a Hub id `org/name[@revision]`.

    A model of the Hub is downloaded into the Hub's cache, only safetensors, configuration and
    tokenizer; a directory of that name goes before the Hub.

    Args:
        model: what the user wrote.
        config_only: fetch `config.json` and the card alone, which suffices for a plan.

    Raises:
        ModelError: there is no such model, or it has no safetensors.
        ResourceError: the Hub cannot be reached.
        AccessError: the Hub wants a licence accepted or a token.
    """
    if model.startswith(_BUILTIN):
        source = ModelSource(builtin_model(model.removeprefix(_BUILTIN)), model, None)
    elif model and Path(model).is_dir():
        source = ModelSource(Path(model), model, None)
    elif model and Path(model).is_file():
        raise ModelError(f"{model} is a file", "a model is a folder, a Hub id, or builtin:tiny")
    elif model.startswith((".", "/", "~")):
        raise ModelError(f"there is no directory {model}")
    else:
        source = _from_hub(model, _CONFIG if config_only else _FILES)
    read_config(source.path)
    if not config_only:
        weight_files(source.path)
    return source


def _from_hub(model: str, patterns: tuple[str, ...]) -> ModelSource:
    """Download what matches the patterns; the folder of a snapshot is named by its commit."""
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise ModelError(
            f"{model!r} is neither a directory nor a Hub id",
            "a Hub id looks like org/name or org/name@revision; builtin:tiny needs no download",
        )
    from huggingface_hub import snapshot_download

    with _hub_errors(match["id"], match["revision"]):
        folder = snapshot_download(
            match["id"],
            revision=match["revision"],
            allow_patterns=list(patterns),
            ignore_patterns=list(_NOT),
        )
    return ModelSource(Path(folder), match["id"], Path(folder).name)


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's library raises into one sentence each; most specific first."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise AccessError(
            f"{model} is gated on the Hub",
            f"accept its licence at https://huggingface.co/{model}, then run `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"the Hub has no model {model}, or it is private",
            "check the spelling; for a private model run `hf auth login`",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision!r} on the Hub") from None
    except errors.HFValidationError:
        raise ModelError(f"{model!r} is not a valid Hub id") from None
    except errors.HfHubHTTPError as error:
        raise _http_error(model, error.response.status_code) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        # Not in the cache, because the Hub refused or because it could not be asked.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _http_error(model, error.__cause__.response.status_code) from None
        raise ResourceError(
            f"the Hub cannot be reached and {model} is not in the local cache",
            "check the network and HF_HUB_OFFLINE, or give a local directory or builtin:tiny",
        ) from None


def _http_error(model: str, status: int) -> AccessError | ResourceError:
    if status in (401, 403):
        return AccessError(
            f"the Hub refused {model} (HTTP {status})", "run `hf auth login` with a valid token"
        )
    return ResourceError(f"the Hub answered HTTP {status} for {model}", "try again later")


def read_licence(path: Path) -> str | None:
    """Licence that the model's card names, as the Hub spells it; None when it names none.

    A licence called `other` is given by its own name.

    Raises:
        ModelError: the card is damaged.
    """
    import yaml
    from huggingface_hub.repocard import metadata_load

    card = path / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(
            f"{card}: the block between the lines `---` cannot be read: {_summary(error)}",
            "mend it, or remove it; the licence of the model is read from there",
        ) from None
    licence = metadata.get("license")
    named = metadata.get("license_name") if licence == "other" else licence
    return str(named) if named else None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a checkpoint; code that it brings is not run.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    hint = "copy the files of its tokenizer there: tokenizer.json, tokenizer_config.json"
    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER):
        raise ModelError(f"{path} holds no tokenizer", hint)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} holds no usable tokenizer: {_summary(error)}", hint) from None
    except StrictDataclassError as error:
        raise ModelError(f"{path / 'config.json'} is refused: {_summary(error)}") from None


def load_model(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """A causal language model in evaluation mode; packed checkpoints arrive dense.

    Code that a model brings is never run: families are those that transformers itself knows.

    A packed checkpoint is loaded as anyone loads it, in its own dtype, and unpacked by the
    library; only then is it cast, so that it holds the weights that were measured before packing.

    A checkpoint of ours whose matrices see rounded inputs, or whose cache is rounded, does so here
    too.

    Attention is `sdpa` where the family supports it, else `eager`; mixtures of experts are
    computed expert by expert, as in the block walk.

    Args:
        path: checkpoint directory.
        device: where it is put.
        dtype: in which it computes; by default that of the configuration.

    Raises:
        ModelError: it cannot be loaded, or weights that its configuration calls for are missing.
        ResourceError: its format needs a package that is not installed.
    """
    from compressor.model.cache import round_cache
    from compressor.model.inputs import round_inputs

    weight_files(path)
    config = read_config(path)
    packed = _packed(config)
    model = _from_pretrained(path, config, "auto" if dtype is None or packed else dtype, packed)
    if SERVING in config:
        architecture = Architecture.from_config(config)
        round_inputs(model, architecture)
        round_cache(model, architecture)
    if packed and dtype is not None:
        # Weights only: rotary frequencies are fp32 in any model, and wrong in bf16.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.eval().to(device)


def _from_pretrained(
    path: Path, config: dict[str, Any], dtype: torch.dtype | str, packed: bool
) -> Any:
    """What transformers makes of a checkpoint, unpacked; with all of its weights, or an error."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from compressor.model.quiet import quiet

    try:
        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=attention_implementation(config),
                experts_implementation="eager",
            )
            if packed:
                _unpack(model)
    except ImportError as error:
        raise ResourceError(f"{path} needs a package: {_summary(error)}") from None
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{path} cannot be loaded: {_summary(error)}") from None
    _check_complete(path, info)
    return model


def _packed(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config") or {}
    return quantization.get("quant_method") in ("compressed-tensors", "bitsandbytes")


def _unpack(model: Any) -> None:
    """What the library would do at the first forward pass, done now.

    Parameters come as views of the mapped file, all of which stays in memory as long as one of them
    lives; on their own, packed ones go as they are unpacked.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:  # `dequantize` in the configuration: done, and the quantizer dropped
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if model.quantization_method == "bitsandbytes":
        model.dequantize()
        return
    from compressed_tensors.offload import remove_dispatch

    compressor = quantizer.compressor
    compressor.decompress_model(model)
    compressor.remove_decompression_hook(model)
    # It leaves every module bound to the device that it was unpacked on, whatever `to` says.
    remove_dispatch(model)


def _check_complete(path: Path, info: dict[str, Any]) -> None:
    """transformers fills gaps with random numbers and only warns; that is an error here."""
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{path} lacks {wrong[0]}{more}, which its config.json calls for")


def _summary(error: Exception) -> str:
    """The first line of what a library says, with the next one when the first ends in a colon."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if isinstance(error, KeyError) and " " not in first:  # its text is the key alone
        return f"{first} is missing"
    return f"{first.strip()} {more[0].strip()}" if first.strip()[-1:] == ":" and more else first
