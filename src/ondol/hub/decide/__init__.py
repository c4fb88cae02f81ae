"""Pure decisions of the hub: values and a time in, a verdict with its numbers out."""
