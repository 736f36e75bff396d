"""The command line: `fastbert COMMAND`. One module a command."""
