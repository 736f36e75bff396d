"""The command line: `fastbert COMMAND`. One module for each command."""
