"""Training what joins the frozen parts, and measuring what comes out."""
