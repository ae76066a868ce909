"""Model families that AutoBridge lacks, registered through its own decorator."""
