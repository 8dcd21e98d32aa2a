"""The commands, a thin file each, whose one function has the command's name; its help is the docstring."""
