"""How much of each drafted block is verified, and whether anything is drafted at all; without torch."""
