"""FermiNet beside ours: what is said without its checkout, and what the table says."""

import train_ferminet


def test_without_checkouts_it_says_what_it_needs(tmp_path, capsys):
    assert train_ferminet.main([]) == 0
    assert "Skipped: FermiNet's checkout and kfac-jax's are needed" in capsys.readouterr().out
    arguments = ["--checkout", str(tmp_path), "--kfac-jax", str(tmp_path)]
    assert train_ferminet.main(arguments) == 0
    assert "holds no kfac_jax/__init__.py" in capsys.readouterr().out


def test_the_table_has_medians_above_the_reference_and_ratios_of_steps():
    def runs(seconds, *energies):
        return [{"energy": e, "error": 1e-4, "median_step_seconds": seconds} for e in energies]

    found = {"kfac_jax": runs(2.0, -2.90, -2.89, -2.80), "ours": runs(1.0, -2.903, -2.902, -2.901)}
    table = train_ferminet.table(found, -2.904)
    (theirs,) = (line for line in table.splitlines() if "kfac_jax " in line and "14.00" in line)
    assert "4.00, 14.00, 104.00" in theirs and theirs.split()[-1] == "1.00"
    (ours,) = (line for line in table.splitlines() if line.lstrip().startswith("ours"))
    assert "1.00, 2.00, 3.00" in ours and ours.split()[-2:] == ["0.10", "0.50"]


def test_their_learning_rate():
    assert float(train_ferminet.rate(0)) == 0.05 and float(train_ferminet.rate(10_000)) == 0.025
