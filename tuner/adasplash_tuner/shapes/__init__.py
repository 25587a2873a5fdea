"""What is tuned for: shapes as a person writes them, profiles, and the shapes of a model."""
