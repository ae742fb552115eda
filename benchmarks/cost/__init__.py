"""What the systems cost, counted as lexiseg runs them and as their papers count; see ``lexiseg benchmark cost``."""
