"""What a prompted model has of class names and of images: their features, computed, kept or given."""
