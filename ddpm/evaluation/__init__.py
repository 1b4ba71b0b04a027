"""How good samples and network are: features, distances, held-out loss, the card."""
