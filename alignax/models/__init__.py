"""Language models as `Model`s: the shipped transformer and adapters for any other network."""
