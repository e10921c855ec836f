"""Our models under EleutherAI's lm-evaluation-harness."""
