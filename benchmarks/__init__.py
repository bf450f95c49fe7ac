"""How fast the engine is: models of real size, what they take, and what they could take at best."""
