"""What each method takes on a model, before anything is loaded: parameters, files, memory and time."""
