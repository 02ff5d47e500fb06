"""What came out, by measures that training never sees."""
