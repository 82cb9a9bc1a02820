"""The commands of the console script, a module for each group of them."""
