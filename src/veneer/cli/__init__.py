"""The command line. Modules here are light; what is heavy is imported inside the command that needs it."""
