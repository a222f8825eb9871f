"""Reading: media values, and encoders that turn them into features."""
