"""Running a trained model natively, on any grid."""
