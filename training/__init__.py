"""How students are made."""
