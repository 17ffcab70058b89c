"""For which sizes a Hadamard matrix can be built here; integers only, so that a plan can ask.

A Hadamard matrix of order n has entries ±1 and orthogonal rows. Sylvester doubling gives every
power of two, Paley's two constructions give orders 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100,
108, … from quadratic residues (Paley 1933), and their Kronecker product gives K·2^m.
"""

from __future__ import annotations

from math import isqrt


def field_order(size: int) -> tuple[int, int] | None:
    """The field behind a Paley matrix of an order: (q, construction 1 or 2), or None.

    Construction I gives order q + 1 for q ≡ 3 (mod 4), construction II gives 2(q + 1) for
    q ≡ 1 (mod 4); q is a prime or the square of one.
    """
    if size % 4 == 0 and _prime_or_square(size - 1):
        return (size - 1, 1)
    half = size // 2 - 1
    if size % 4 == 0 and half % 4 == 1 and _prime_or_square(half):
        return (half, 2)
    return None


def hadamard_split(size: int) -> tuple[int, int] | None:
    """(K, 2^m) with K·2^m = size: K is 1 or the order of a Paley matrix. None if there is none."""
    odd = size // _power_of_two(size)
    if odd == 1:
        return (1, size)
    order = 4 * odd
    while size % order == 0:
        if field_order(order):
            return (order, size // order)
        order *= 2
    return None


def hadamard_block(size: int) -> int:
    """The largest divisor of `size` that is the order of a Hadamard matrix built here.

    Raises:
        ValueError: the size is not positive.
    """
    if size < 1:
        raise ValueError(f"a matrix needs a positive size, not {size}")
    divisors = (size // part for part in range(1, size + 1) if size % part == 0)
    return next(divisor for divisor in divisors if hadamard_split(divisor))


def prime_root(order: int) -> tuple[int, int]:
    """(p, degree) of a field whose order is a prime or the square of one."""
    root = isqrt(order)
    return (root, 2) if root * root == order else (order, 1)


def _prime_or_square(number: int) -> bool:
    return number > 2 and _prime(prime_root(number)[0])


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _power_of_two(number: int) -> int:
    """The largest power of two that divides a number."""
    return number & -number
