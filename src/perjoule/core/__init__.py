"""The types that every stage speaks. Importing anything here imports neither torch nor a sensor library."""
