"""What features carry of a layer's scores, and what predicts them."""
