"""The frozen parts of the embedded model, trained from nothing on Toybox."""
