"""What Pocketune claims, measured; the documentation's tables are generated from the raw rows that these commands write."""
