"""The chart (`moonshard/`), values for it (`values/`), and what generates parts of it."""
