"""The search: space, objective, journal, decisions (`desk`), and Ray (`gang`, `driver`)."""
