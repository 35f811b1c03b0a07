"""The processes of a run: who they are, and what happens when one of them is lost or stands still."""
