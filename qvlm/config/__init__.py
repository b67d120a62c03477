"""The configuration of a cell: its schema, and what Hydra needs to compose it."""
