"""What a prompted model has of class names and of images: features, computed, kept or given, and routes to them."""
