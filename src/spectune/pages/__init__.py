"""Reports as one page that asks nothing of the network, and what they share."""
