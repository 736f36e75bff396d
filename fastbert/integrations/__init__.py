"""Ways for other libraries' models to run on fastbert."""
