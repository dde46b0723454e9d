"""Learning from rewards: rollouts, what they are worth, the policy and its trainer."""
