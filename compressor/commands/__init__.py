"""What `compress` can do: one module for runs, one for measuring, one for looking things up."""
