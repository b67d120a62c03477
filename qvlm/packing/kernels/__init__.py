"""The products that packed layers compute with, a file each."""
