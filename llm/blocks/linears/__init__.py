"""What stands where a linear layer stands."""
