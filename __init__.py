"""vpd trains the VP-Drafter of D2SD offline, from a cache of the target's hidden states."""
