"""What adapters are made of: low-rank factors, seeded first values, and the modules that hold them inside PEFT."""
