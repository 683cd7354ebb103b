"""Tables that commands write and others read: their columns, their files, and a report in memory."""
