"""A listing of machine code, counted instruction by instruction."""

import pytest

from cute_quant.lab.machine_code import opcodes

LISTING = """
        .section        .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P6 EXIT ;
        /*0030*/             @UP0 UIADD3 UR4, UPT, UPT, UR4, 0x1, URZ ;
        /*13e0*/                   @!UPT UIADD3 URZ, UPT, UPT, URZ, URZ, URZ ;
        /*1470*/                   @!PT SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
        /*1480*/                   EXIT ;
        /*1490*/                   BRA `(.L_x_2);
        /*14a0*/                   NOP;
"""


def test_every_instruction_of_a_listing_counts():
    expected = ["LDC", "LDG.E.128", "EXIT", "UIADD3", "UIADD3", "SHFL.BFLY", "EXIT"]
    assert list(opcodes(LISTING)) == expected


@pytest.mark.parametrize("predicate", ["", "@P0 ", "@!P6 ", "@UP3 ", "@!UP0 ", "@!PT ", "@!UPT "])
def test_a_predicate_hides_no_instruction(predicate):
    assert opcodes(f"        /*0a30*/  {predicate}UIADD3 URZ, URZ, URZ, URZ ;") == ("UIADD3",)
