"""The one way of a call: from a row to compiled functions, frames and launches."""
