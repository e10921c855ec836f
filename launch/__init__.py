"""Entry points, one thin file per command. No file here may bear the name of a module that anything imports."""
