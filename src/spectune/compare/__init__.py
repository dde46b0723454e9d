"""Every method on one model and data set, fairly: trials, their results, and the report."""
