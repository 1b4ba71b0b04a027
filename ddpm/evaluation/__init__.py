"""How good the samples and the network are: features, distances, held-out loss, the card."""
