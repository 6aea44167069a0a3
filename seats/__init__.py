"""SEATS: stage-adaptive token selection as pure tensor functions (arXiv 2605.20035). Knows no model."""
