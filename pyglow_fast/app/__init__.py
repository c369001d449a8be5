"""What only the program needs: its commands, the page in the browser, and what they are made of."""
