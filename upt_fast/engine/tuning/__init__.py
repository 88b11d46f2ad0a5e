"""What is fastest on the machine at hand: measured there, kept, and recorded by runs."""
