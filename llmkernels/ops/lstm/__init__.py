"""lstm and lstm_cell: functional ops and modules."""
