"""The deployment: compose files, images, and the demo system that shows and tests the backup."""
