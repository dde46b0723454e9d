"""What the reports say of models and methods, without the command line."""
