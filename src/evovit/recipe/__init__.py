"""What a training is: tables of options, read from TOML."""
