"""Layer: another program's numbers, and hostile files. fastText's models score as it scores them, or are refused."""

import base64
import json
import random
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from llamita.data.fasttext import FastText, _tree
from llamita.data.strings import Strings

PEER = Path(__file__).resolve().parents[1] / ".venv/peers-data/bin/python"
TEXTS = [
    "",
    "the river of straße",
    "猫 жизнь kat kat",
    "unknown words only",
    "__label__hq blue __label__none stone",
    "a </s> spam",
    "tab\tand  spaces the",
    "katdom" * 700,
    "the river runs " * 700,
]
LONG = 2  # of them, the last
# Trains a model and prints what it says of texts. Fewer than 10 threads, and sizes that are no multiple of 10, leave
# weights that nothing has been written to: a fault of fastText's. So `buckets` + 25 words is a multiple of 10.
PEER_SCRIPT = """
import fasttext, json, random, sys

words = ["kat", "dom", "river", "straße", "жизнь", "猫", "stone", "a", "of", "the", "run", "blue"]
pools = {"hq": words[:8], "meh": words[4:], "spam": words[2:10]}
out, labels, train, quantise, texts = json.loads(sys.argv[1])
rng, lines = random.Random(7), []
for _ in range(200):
    label = rng.choices(list(pools), (5, 3, 2))[0]
    chosen = [rng.choice(pools[label]) + rng.choice(["", "", "s"]) for _ in range(6)]
    lines.append(f"__label__{label} " + " ".join(chosen))
lines += [f"__label__{number} " + rng.choice(words) for number in range(labels)]
open(out + ".txt", "w").write("\\n".join(lines) + "\\n")
model = fasttext.train_supervised(out + ".txt", minCount=1, thread=10, verbose=0, epoch=20, **train)
if quantise is not None:
    model.quantize(out + ".txt", verbose=0, **quantise)
model.save_model(out)
model = fasttext.load_model(out)
said = [dict(zip(*map(list, model.predict(text, k=-1)))) for text in texts]
print(json.dumps([{label[9:]: round(float(p), 6) for label, p in each.items()} for each in said]))
"""
# Two models of PEER_SCRIPT's, hs with subwords and pairs, and a pruned, quantised softmax, and what it said of TEXTS.
HS = (
    "c-m!?4N#3)7{^c9$V7ElAL4GI7?<sHO-T1Vx8!4dRBo-0UCE`JySlfV-adp@k!D+EDqCWGmzB227Lt3<^QMo@3fZt>W86^DG?uY3tJ*a8CcDqfGw1*"
    "NpEKwD&->1)v<Yw>MF<(z-zNQS)!#;XZLHVt=Vt2py$<Vd=efe?I?r(+?ALaBUoxBwRG+@QT{%kXiM|@oH&!%WXw=?JClLmZi&00)iNb(w=|7Wo29S"
    "}jKP-!uRUeU)RR$yan>cwiS!lorSqzc<{~V5ZesmB=W*9g|At$Z|2ve(w%a9BlnLZeTBclJL;K*cyqYft%hit+Thrxicksm-E&Jp_|S%=WTML06f!0"
    "VK;@(<LXk{kHChCMlAF?1zIObr+ss+6shD?>vSn}|y984a2$xnkfCe(Z8lG8J($*d$P|hUv$*4oc?HlTFig8<?~%l796zhgO~~)SlkquAQ`%NAfx!>"
    "}zGPKe!y0=Pk!Yho-{%%a0gel0sFl*0Zj{{jj;!1cl>0Se)=U?7NeI(%52<>xN0JuT`L6v^knOn<JJSrSsLcFfwWfJQSOu?N2HctPaNV#3*>PW-jdL"
    "5yPgjw^^ZA7986$89E}KvEm>H?;C*v_-*ABrYiTqxNl#v6=7C%=F!y{nUbx2yzmq8?%-dkWNRK=$N*g8et>Q~^cqdCZ-k^mBiwu>729tG!KEevMD)y"
    "pv$apy^Lu}4+U}g7#W_r4D&(p6S!3QlH3I}GGTd$PC9@34p-+GGqZwQbc0M$LXFj>w=vHf-bMFOBDiI?0A{D0pG8Q{!v#{c!6K|IF53I<sljttkN<<"
    "UNF+P1Mbl%*<zCU!8Rwk+7@vXZ|x+G6rba)R;aGJ)K%q)U)wQC{6|2(t@bNG3WBihKLVg9@#=DWd<{cUA}@uM$Mcl8rm)@{m57MDSoHVT_OvT%k*1*"
    "bbMvn!$+Or7lmHq$L|>tZwb>x?s+Nyo7j`7Y>o)fhyX&FC1PhqWWtLg{@CIvVAp!aNTWJ?}wR_f$!?PX*2k>|;&~vS?MtH0rs#nI%<QYU-M{GlfqHH"
    "hgD|N{d?R3!Ti=qLC&(suCM}q{EqQ9QbA_@W`$-JeB57y-b>Dqtz79&2|S__W}$^Nrsx@25<=4i_#MUzCdjz32E7m$5kR)nDdD3nlT34IxRIL%yL;}"
    "eIz}ZYyqvk{`{O--O%ILAa1#6%ja&Zh8y6*ypo+*rm{#IeJvA4W*&!d-!%L}xEd!e>%%f*4U8B0GPm(9%++ZUd@6q+PJVEXF0vDdb<V^2?04m?Dovw"
    "(r<AhCq84ye#NzdUHfEk$2n{VsxGjDyWqnoDYw~3_MKcDjdTl|MOIK*8cRth|)Pa-nPP9Jyl6F_uVEB?$=r~xbwJZ?w;nI^}zRC>}0;CelnqEBd`)G"
    "E!%#*eiR<q{&wcuT!0Z#(~edGfCVV@~q-+l~q+E&)yTSxuu;uwl9vZaap;g9u7gacD~%TizZ#_bffx80~M^4!bTd}aepD=Ack?1b$J?^x046goF|6b"
    "n%gX9cDHY?)jD{%soZ?OtOn4LZqg$!%fqAsfcf5eX7HvWvg=beCjebCu+7OP8eMWdToy)W6T@JkS"
)
HS_SAID = [
    (0.871414, 0.002359, 0.126249),
    (0.113618, 0.005551, 0.880868),
    (0.999997, 0.0, 2.3e-05),
    (0.028298, 0.874649, 0.097093),
    (0.0304, 0.934813, 0.034826),
    (0.674504, 0.302283, 0.02324),
    (0.015973, 0.857939, 0.126127),
    (0.99996, 0.0, 5.9e-05),
    (0.00392, 0.570738, 0.425383),
]
FTZ = (
    "c-m!{2|Sfg8}|<(LZlMXqEIQ?v~sTNSP~V5lKRUoYqk^8uB5bRUz8$Co1&yeoEa7MZ_y$x+C$Q=QWEN&`)PWf-uFG9&)1xp&wbB5b6vmdH}`Q)d+Ja"
    "%kx0~mp~&dQkmKJw{6$x}-{Zn}e}<`z{@a?-df1bF*Wu$5CDDIAo#cMEmP4f=`d7q1()khL0ivKk-B;^#MZSMJKB9mAcUiR0#q<EttUm+M!Lb3+BKt"
    "qxP@nlC$)C=x)3?svI&({Qd%aXN`u}>6RAm0AKR+lyH1to$KVqK9?5{OQMT7sl2&rh$|Fa6I$mq{V#9WcVUz12heg3<^nDGB~BIZg(z5iP4U%mfqL@"
    "Ltz)AtRF3HV=+tx_t|{cBFCNaOD-r6T1&T`#XNAK!p5FR!2|(L6pT_us*J0YRcM|KF%I(r2E?@Xzp3_D6+fsS|6JS*yU>j;!s+S|!$o2?}8CBi1UgR"
    "=BYPSAabG^G%q9wLe(9m=VQT#1Qtnkm1CL|4&{;q6LgRMhqiF*eGMA5MqYDuvJDrBa$&ph#+I4==U0ALJ%1}7{Lr7T1y$Jj6lX)u0~IWA0t-?mY_}{"
    "N{nho9Ah@WrkpW{v5(=wxW*8a_mwe|v6<n<NM}svN_G)q#hAv(VmR~fQyJSBu8i({&u1BqjAX_XhEN@o8QU3?7=nr&1mW>Leqc;s9AelqmNTpwBY5m"
    "iFsvBI8QzTHLY47nAdiKZ=gvaN-5*$g2Cw2I#%dnxD!!&J451RW*mdr#)nKilz0N#`Nj%nVTrippRpCB%-6lZ;jJaGB8(5pbW6;bP!dS~SA!y7}&=@"
    "0|&mrtVP40IrYPjPJWGrDE<Z}zT=_;&?VJAFa?ssm~<$lLTa4bQ4U;fgRu%`^+8lH14(eGz><nAQLwXDpwA&lMSnmZ@@T?@WEW`Z^Y7@rw}KWyc(G2"
    "^i~Ci-17rx~#fq22_)S;YwFF`LJ0<Q{96F-#agxm!-)dn@DGy20lbG^Ncr!1pNBkPYKIqZgxz(U(!k0LCbW0j~u?<MoVjj4h(ywJbclKZA&V*KiBNn"
    "D0%ntUAU3#$i6!d&W?{hta&Y1S78HIU37rOW2#>mG2lM8IO4koO!L@;@1jV7aUYL1jaKi@K|Vbt=n?#JZG$6Y~<b`%$dk*a23ztYVK86xu>jQtmCzI"
    "l4~x9j|rMt&)CICVHEJWfAQEP@|+s+8otD9REX&g(Qi%fWIW+>eB_=Z<ajsN)*hbwG)5_7FXImPmdV^h+_@%&81Lt?&*U)`yyP`svjNZfCSC)3xhL%"
    "4xe@L?@|VX6wRDtw?lGQ=JgzapOD}WJh~^&R!eb!ev3kKZ)XF%;=N7d5iE)N|`dPl#BJLGJjZj80ql9yld-Qd#F)_a;l*dHyl=F;so_oOqFY;Uq+P}"
    ">`*_G$Og0Foc*NouJSGd<*<C?wBb6deRAk>bk-0!t?<Jz;~a|^Xl$q{n%kbB@oUi+QdefPO%2%h|u@j&!jW7Yf_!aahQKH?gFEc$IGf;JlYJwlB=<2"
    ">hQ$O|5;8h+-~axWKZPI%@^?&<a1`x<!dz2<9p!)yI5*YG>8x%d36{J?AUBlqG)enx)c-uan7;|q^r6VLTmezt$(xo+lX`giViE&SQ7d`)fqOls$6_"
    ")o5hU%W<ySjfrs<L`VOxck{M8&`RKz~%f0i)@=8w+?(R9XIn36du!)Ony^xbHv#EyR9$0mJR-Lc536uIQjO>(Pqb7R1ZI@4{}($+f{>}d$IYSb^Wux"
    "_(_!?8V=ar*=rV^qi_4XVD>w?;PID4wQG#7x#uMe(Q9&Sg@@&x{%y3n{z$Yp*3f_I_~zz`D~G2k4O<`WlbAdB;@%wJH_nfW3&yC|o!*z&cSqdMf%5r"
    ">`kRy_nZGJpXkBryc+tE))yY*RzGps|_BpWX$mO2fIx3!xdAfVh?9`Ut2j5<6fj-8e({|j^OYV5LTey||oOIdEC3cgSZHryjLvi!aZ@Qm4PyA@<y~U"
    "|hPJm6nU0L4-r!SbVyVP^yx!XFwPIX_dyI5_)tQwnjpYQcJv9N>N?v#^`W283>GP+)nuXyKjer|AHUawbIh}zn=0jo!)_ItE=zfQ_&&EW>$ug3qn5w"
    "h|2gHqd#yTn)Or#*Ao_oaE*k4taGQIlkW8Xm^EqN+u$9~<|(4!yNqX@#-dgvc3@n%{T6UO#ZeR{x!cwC5e(;?QNa|E7pt<<Uu!Li={p$1kVouU`3ak"
    "7LonrmMXT#-EHgs;}L);ejWT!0;=o{vm$uX`AX|HY`|EUADvfxS95_4hokm|9SdVS>gVQC(B2UcCue8*LQliwy%|4Pj&ohT`<A&y?O+W`t<XqiYT;Z"
    "(4F^D*BhrF%^vN1QCa0kMdrA#T3YX?^zyhcqyZz99+4;A1D+RkJvDY!&oa}0U4qV>>T)71L+-q}-6WsBb#-$awjO<UeE;RJ$A$Cn&rDciF(a)5e<P6"
    "RC-~Iqsl-%IMjD#mLO^tdc;8VkkS4p}uckQY=DmQ9Db<oCyQtClx%<i6`_VMdH;D8xv8K-^e1T~$o;3FG0CaG*qJ#I0p?iuoFjDQcEW0WfRMWSTl4d"
    "E*HoZdvzqCU`)-&-Ns*AJb)1aVRIF_vHMcNYP(RP#Jbn4A#uyN%CJl-W9wyP*%*F1L|Un`GqEON!47fz;cB0JNvNKG7c46#FZCsb4zDRwv!Eql@1o2"
    "C~ZhZRZI=-l6k>|ei_p3F)XuP=*7H&Y+Xx3z@5wW0K!yb`IKZ-?JsRl%S#SNe?=L;==9^c{2jaP2m{b!#A*)9!;#?N+htr8L;2BE{G5qv76&SackB6"
    "Lhy~VB`5WL}Abv>XuR?vo80;kE8QQaIz0AQmTgXv6ImH-c)*Vn<~^U*MfY56%ZVkNa~))Q2Eu-cp_&RQR?=bM0vg>-E%gO(7+&6fByn(;wRC@xEk5o"
    "^xI_lvD0L6j}W?JT0hV`>`2x>2#50}F_@3Gbc(hfReQQq=GPWWGn=lLlqE*cme$YWUY)L!@6;b`nwAr#8SQXi$&)?|8&AV@^C5%uh7o(dlc?HY(2{A"
    "<e@~fGhZ&>sUgxC{?l~H-YdX>TBsrQDkzm<p$5I-lzJ*ji45aT%vS3@60umCi1|I80;nu7aa^~Y?I%(xiQgc%s!gEK;@)s<mnT=JDvcv+nPTL71YQ3"
    "oYv%b`3z7F-CwHs!-2h$N{55zCeJS7Usow0t$Bx-W)0?dvL!d7WBIXG1$i`-1W)7S#-=lvj?`{>YKiW+b#=^uPPEQ2UW(!lMI7nyAAL%-{ep}w*ENv"
    "y&QJRhe>r>vVxt`tbAL`5VHk+-LHS3ZhuQ#4Rwp9A^I9=O=}GV$2%Pt9Z2krNUddNwcttOM@=O{gmw*<C{Ktx~0SQfFG+t4vmq;7#K+-01x$eMqC&1"
    "-?ERiHZ~2NqK-Lb+&e+QCC!O_5n@m`B5F6#;ef$s!nutgDRe{x5JWF1MFk{Nj5ZUEc~#ELmlghpxJ8*UR0V2j&~-|H)TU<=A%Z^<#s4)E0lwS_BL^F"
    "gbF?t6+q$u2aHJH0!A6ybW8nctSZvQleVp7tG*HTztf4z>)42|em@P%ANXPGuH|6ZLz9%->?KR$wP>HUo1t^=4D4#AOqN}qLzjNY6_42-OFetMBJ)N"
    "}hwJ0qWqabisr0xi{=DE!JvO|7@gKafYG$XByRvY!Xy{ApDgcu_^Tg|xEv0*AR72ShIWj)_0L+{<3xhiikagYQNoN~*5OI&GXf~%%re$D5O<aFLV$c"
    "BGsTd8ur()4}NF!`+Y$48H%gDVG64Gar2(>27!lC7fkZlr&W7;N?>iSV=x}k_f+xMe>cNb9cyEt*DS8u`e;0+T0G=-o+4C-qPK!1I?bM=GONWqjT*v"
    "~Lac6wA6c&$1>Qoi-1H_m*7ph!<FpQuR(%^E}Rs2>H_ED8@s&7~z9?vd0_ldvR7BJ<9QE_v1$$#G&XGr7H#*1z5asgvhYYjZ!W>~M^12-AQ{+r?-!E"
    "QRda9)pu?4~X|UE~F;y%A~p|j3%VW(Xr#r>9=*;N!CJbdVg>Xtn3<xu{W+l&7nZLtZF2TX&;J3;}d0)Uq00CS26Kc^`IdShg;U!8{zw8JEB55kh84v"
    "W}A(rna6?Ls)(hX=3Erd(zygz<y5I$Z*!_=d;<=Msv)at%eme$%5->LB&P4z7gvl-hpQqTtkXD5wkIInYu5wyN-XhaP%cTeaiFH;yLj?_4_Ypt13$W"
    "k;i}=^#H9`*I>db!c%KQy!8dYY-<wF>7xmEcTgFm)pr;LlnJ&VsJ-mp+-FST2(*(lfN1{n;JZP4C)7rdz7$O&rjw&it*V2OcCVdC%N>6MLEF*)19H?"
    "B&3o=I6l)5G>f@8B4ZCO$b9}>snMD+;rwbYjyyZr>u)H!JIb0%3dXc+DG+6ev~A*GJb<`Yf*2vm#QNuEAm1Pw6*(DrC5gr^6J&n)!7mCj9|c+MMh3i"
    "6;zVu}rl1T2Oi4n5cxy+w8u&Df8IbqC?)pbz3ru3yNmuGdQprITpN?B%k#&w}ZI%;EG~y&UbeEQ1se8$#bb7(~w`1NydnfU)+jSn)QQG?dPwZkKb2&"
    "utGHZOG#FIugl56+GW$gT=w|IKi7*D#z54!v}3qPDzKJNZ&)2Py_HWbjC>gA23eV1FIhv%3Oc?QT^d_Y1{lAWSZ4<boWyLzsg-;?J<&`T#*mczjejn"
    ">y{u{-3RlWrecTOHPCYZELr;4k`A~(9m<|`q?=Bclj|S->HK~d#V3g|eRWWa<eKQw6)A?)_S<e~wirtv8_8j^q%+ozb-~$^Ga&bqosY)8pz6H<yT8("
    "qIr+QM6@~s3GmgULjGZKC&;b%@@myBw;6yjwHp7m}1F`qo2(nc*j(&-nLjnR~FgT=DR*|s~^`iCBbny-1D3Q=EJ3o>759Z>wnM)C*RQCO0AP&y2AZt"
    "<sz_@cWoVXW=A*#AEm(5?{UP&c6`h6fw`?3j6hx9MmbVQqOja~tx9veWYw>4egU6FKI`T#<;UXshbL>LPC<nV&iU?r=7nZB*0b=H2;a!nrXGURArNd"
    "Psn^`blOo|OI5eGpv~yAlkfpT$R(nbG%ySse05$wcvs@Bvs-JM&kh-w01E9nwbpJk0QwQ4g_B|IRX%6n#3m$%<%M-G%zj4%Ew`5P~hVsjrC+maBI~v"
    "!^wnFKHru;HOxv4$*KzAF{iL7G^Arqw)Q$P-nUpeRBRRXx{Y48SXCV)a-yew^>n#k<M`cn>@N7Y9gOyhB&FGE9$0ACq`NUWZ_;5Qu*BrXKn<@Y3@!}"
    "-ghF+VpTfr*CFt^5=FI56QE~GPa3JLg`qC*;Om_qWMjTPP3Ri|g`#H`+HbtX()O!jzv;nvW^Xsz?NS7trIiOzcb+uvN)u05=mKx&J5W8zMwlL8PS4%"
    "HCJt*HOE32;Ah)V~iSz2=^qxj2UJ+#w4AsZUo-bk0FbB&eu{|*Ny$u!rutLLSIpozNz{CbK>{c0srwdn*AzIfV_H?;;zSSHW9v?)WK3NTsZDQP*Coc"
    "=ut^zO70D8i*)^dZ(C(!G4nuP4=Lr<m-rqSm*(xMPEx~y{)T}0e)|Kws=8CpkLPi4Y|G#h+uqK!)D6|q3QFKF7olTB9Cqt?C|aHUNh`?oB>$6KuF>O"
    "E`3yB!aaBU}5^yy4kUV7o=UXlxL95?@x5GIS<J7h6LQ#U8l&(`*>JLk+Aigo_879VPlJ-Vx0NHMor)_}w=G3&*Kb1?M4Rop2Ee+egF!IbG;7(Q_z2+"
    "=mwYP@wW<(`Zn<5}lB$L?<p`ex2?^3p(jgvw4-WT#bKd`s_()eDSj7rsUd^3?raUDk?C}vlP}polk4J+YytiTga!ntHeuwk7XkGV5rEOu3z3x?6RMe"
    "plv;=%55=tyq!V+>26QYwu~VWX{yxmvl3=(%OH70y)owO9pYmtw!F}#nnWdCm#qschwK?$&|;Ji4NrBa5xtb@#6dB%_3~+PoLeBa_cx$Rqxxdu96L0"
    "7&1&nYHNAN)ghotPLGO*mWKV-Sc9NM<r=-a=bAuKvyL1K~$9^HzBOM{(`va2p+8;;$ItAkEU!Zj0Wm)#aL*ki6Y8aY40>79i5TnkfXxlnboI7YXcx?"
    "zEKUO^u7a!_Ew<HDP@hM@ruFjcE$r(w8eU5{gw9C+;Rg)Z4RHuFi&Rf{r`aJGXq2A<@5&5lNgU>d`wU0igY8ABBmA?3={}<`Q0i9>fu`PHPe5uyRJ;"
    "Bkjy!_usd-obn9X@>cdLN(Mi#a*x->9EX-0@T1#3bp}!iwT~)m6S9`mEZfs2H<*cFVzQaCX|A<hysn({I`>i|w)b+oy?^TRH{w%Nnsj*Yljt<mHQNY"
    "S!I5(V@f1F*h<U%$++ouh%KHwv<#&_A$8nE97?RMzQ$WzUCiqqhuP!qD3F~58b}PEi&@^>w#N$Y9Dr3y=hmp#NPC!{>nW?O})p**VjJ?ymH0gKdo-V"
    "nlf**VG5N`mG3_p>9n+Ox3670T2Gh|F-j#gbkO_j)3cqA9Ldzun&L48l}PvJW5@P%aXHf^OwQbVQbWVh<Ch=LpSfg)9RH>Chq$NpV4M>QI%!8RvqBv"
    "gzbJ%|hpX7zPcj%*9s*axe7N~=FUW5ih(o<nB$jdVn6thBb60hcNXp)TdwDDTni~%aPq#qxi^GuSlM9CCtD$#t6`XrA4&Oi4#hG>b*zbxqCVpKGC6~"
    "(KYJmc#ip#*Has#ekoD0)UTcF{95jtD;mn6QviGB)ocp~LBNRt#KH=C;=fW1M7<{rYJC;9kf>_*UhcM1AkI0Z+()WM<RQy}rYiXm6}<AI+?A*m%0y2"
    "WP0`&)_VzfBGEHm`v8wMSsC$pz@2)f4wN4Z)LBK7rh+Xq3H52K`-EV8OmX$?f2S0Dfu6YzR$N55SgW#L1N-F-CS70{w5mnpJ*Krl5<qCpSap@#h$J="
    "qNM?+`u@;**O07PPkXN3@Rs#mY92{f?S&^T-f&*-m8p(#QIu%<<>zmr+EqX>}@Eydz`tWzMLd5K@Tf)TQT#_DX30AkFrBM(eTH0h&C#Lt{04PR5vAj"
    "7bXMU^>&izoHtlG?<*WD+6&E#Vj=lh8Wtr_!XYbjz^&6`@c8-`I+b39zSTOCAxAA>pbpEQ!FXJwnT{bhd!wFRDa>fwj|0!Xgz>>$G1GP^7{AX2y>Lr"
    ">eyImGTh?NeZ4C@dDu=I2^08ylI()j~Am%n!KvY{1gl4#*ovXE^wL%lKi!Pvs`#ESglf%xMO)z_N1>{Z~gTq!1#_*lhplF_i#>;D<?!+-H$*ltY)fJ"
    "$;PK0J^%W+9v8GO4}3`a6=;ikcjkhReY_jXmqoq8|9*MA$dqaoHD+y!;dWVmHeEI#TUhbvYY;>q!MAaVaT2<cdgJ|VN9aIOfq87QLpo^)&pwTCM$8t"
    "5DI1?#V<;o8<Be6mjgrB{!m{)k1;{aFYml$C+AxgMrwr(>H>cRZl>7Gl)bK%xI|N#3m{xS)Opk8M-N4fhGgTs{M7pR3V7<2BBiF%hh$RH4P)5_q}f8"
    "w}5m!SP<Hu;fGr9(PwobEy?-LIOIyX@Zg&h44Ab9iK(-!ri+Z@rRZsO0)Cexi5u?C3|p%Oj&YmekEpqo&foMkAZvf3E1P>2)|MiLD$JtGP9`*rdPc}"
    "y@X;ge{~7$bW1`0!~u-<n*$$|A3;ofA*O7954UfBz{IC}V4(e0tQr0iqzz2NA?DcG@h2_~?Ip=bErafNkHDlGqjBNbk5Do35lHP9qlfZGaDHongP+P"
    "_W6&+gmK?><+OP26f64u6Ps=PM)2)rI^i8txoRg%~{g%r4%w4M`;U5-@CpEmJt$D{w{||}kgPQ"
)
FTZ_SAID = [
    (0.660845, 0.030707, 0.308479),
    (0.010432, 0.002342, 0.987256),
    (0.999991, 1e-05, 2.9e-05),
    (0.02819, 0.88985, 0.08199),
    (1.6e-05, 0.997127, 0.002887),
    (0.999936, 2.9e-05, 6.5e-05),
    (0.004462, 0.504807, 0.490761),
    (1.00001, 1e-05, 1e-05),
    (0.000129, 0.508992, 0.490909),
]

LABELS = ("hq", "meh", "spam")
STORED = {"hs": (HS, HS_SAID), "ftz": (FTZ, FTZ_SAID)}
DICTIONARY = 64  # magic, version, 12 numbers of 4 bytes, one of 8
INPUT_SIZES = {"hs": 1, "ftz": 2}  # bytes between the end of the dictionary and the number of rows


def stored(name: str) -> bytes:
    return zlib.decompress(base64.b85decode(STORED[name][0]))


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.bin"
    path.write_bytes(data)
    return path


def after_dictionary(data: bytes) -> int:
    (size, _, _, _, kept), place = struct.unpack_from("<3i2q", data, DICTIONARY), DICTIONARY + 28
    for _ in range(size):
        place = data.index(b"\0", place) + 10
    return place + 8 * max(kept, 0)


def said(model: FastText, texts: list[str]) -> np.ndarray:
    return np.stack([model.score(Strings.of(texts), label) for label in model.labels], axis=1)


def check(scores: np.ndarray, expected: np.ndarray) -> None:
    """fastText shows no label below 1e-5, and of thousands of features it and we round a sum of float32 otherwise."""
    np.testing.assert_allclose(scores[:-LONG], expected[:-LONG], atol=1.2e-5)
    np.testing.assert_allclose(scores[-LONG:], expected[-LONG:], atol=1e-4)


@pytest.mark.parametrize("name", STORED)
def test_a_stored_model_scores_as_fasttext_did(name, tmp_path):
    model = FastText.load(written(tmp_path, stored(name)))
    assert model.labels == LABELS
    expected = np.array(STORED[name][1])
    check(said(model, TEXTS), expected)
    assert np.abs(said(model, TEXTS[1:]) - expected[:-1]).max() > 0.1
    alone = [model.score(Strings.of([text]), "__label__hq")[0] for text in TEXTS]
    assert alone == model.score(Strings.of(TEXTS), "hq").tolist()


def test_line_ends_are_spaces_and_an_unknown_label_is_refused(tmp_path):
    model = FastText.load(written(tmp_path, stored("ftz")))
    one, other = said(model, ["the river\nof\r\nstraße\n", "the river of straße"])
    assert one.tolist() == other.tolist()
    with pytest.raises(ValueError, match=r"no label '': give one of hq, meh, spam"):
        model.score(Strings.of(["a"]), "")


@pytest.mark.parametrize("name", STORED)
def test_every_truncation_is_refused(name, tmp_path):
    data = stored(name)
    for size in [*range(0, 700, 3), *range(700, len(data), 13), len(data) - 1]:
        with pytest.raises(ValueError, match="is no fastText classifier"):
            FastText.load(written(tmp_path, data[:size]))
    with pytest.raises(ValueError, match="no fastText model at"):
        FastText.load(tmp_path / "absent.bin")


@pytest.mark.parametrize("name", STORED)
def test_flipped_bits_are_refused_or_harmless_and_never_cost_memory(name, tmp_path):
    data, rng, refused = stored(name), random.Random(1), 0
    FastText.load(written(tmp_path, data)).score(Strings.of(TEXTS), "hq")
    flips = [8 * place + bit for place in range(DICTIONARY + 28) for bit in range(8)]
    flips += [rng.randrange(8 * len(data)) for _ in range(400)]
    tracemalloc.start()
    for flip in flips:
        damaged = bytearray(data)
        damaged[flip // 8] ^= 1 << flip % 8
        try:
            model = FastText.load(written(tmp_path, bytes(damaged)))
        except ValueError as error:
            assert "is no fastText classifier" in str(error)
            refused += 1
            continue
        scores = model.score(Strings.of(TEXTS[:8]), model.labels[0])
        assert ((scores >= 0) & (scores < 1.001)).all()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert refused > 200


def edits(name: str):
    """Lies about the model, each by where it stands, how it is written and what."""
    data, place = stored(name), after_dictionary(stored(name))
    rows = place + INPUT_SIZES[name]
    yield from ((0, "<i", 1), (4, "<i", 11), (8, "<i", 0), (8, "<i", 2**31 - 1), (8, "<i", -1))
    yield from ((28, "<i", 0), (28, "<i", 1000), (32, "<i", 5), (36, "<i", 2), (40, "<i", 0), (48, "<i", 10**6))
    yield from ((DICTIONARY, "<i", 2**31 - 1), (DICTIONARY + 4, "<i", -1), (DICTIONARY + 8, "<i", 0))
    yield from ((DICTIONARY + 20, "<q", 2**60), (DICTIONARY + 20, "<q", -2))
    yield from ((rows, "<q", 2**62), (rows, "<q", -1), (rows, "<q", 3), (rows + 8, "<q", 0))
    first_kind = data.index(b"\0", DICTIONARY + 28) + 9
    yield from ((first_kind, "<b", 1), (len(data) - 4, "<f", np.nan), (len(data) - 4, "<f", 1e30))
    if name == "ftz":
        yield from ((place - 4, "<i", 2**30), (place - 4, "<i", -1), (place - 8, "<i", -5))
        codes = struct.unpack_from("<i", data, rows + 16)[0]
        parts = rows + 20 + codes + 4
        yield from ((rows + 16, "<i", codes + 1), (parts, "<i", 0), (parts + 4, "<i", 2**31 - 1), (parts + 8, "<i", 0))
    else:
        yield data.index(b"__label__hq\0") + 12, "<q", 10**15


@pytest.mark.parametrize("name", STORED)
def test_lies_about_sizes_are_refused(name, tmp_path):
    for place, layout, value in edits(name):
        damaged = bytearray(stored(name))
        struct.pack_into(layout, damaged, place, value)
        with pytest.raises(ValueError, match="is no fastText classifier"):
            print(place, layout, value, FastText.load(written(tmp_path, bytes(damaged))).labels)


def test_words_that_all_collide_are_refused(tmp_path):
    data, end = stored("hs"), after_dictionary(stored("hs"))
    _, words, labels, tokens, kept = struct.unpack_from("<3i2q", data, DICTIONARY)
    more = 10_000
    sizes = struct.pack("<3i2q", words + labels + more, words + more, labels, tokens, kept)
    with pytest.raises(ValueError, match="cannot be true"):
        FastText.load(
            written(tmp_path, data[:DICTIONARY] + sizes + (b"a" + bytes(10)) * more + data[DICTIONARY + 28 : end])
        )


def test_huffman_codes_are_of_least_length():
    rng = random.Random(0)
    for size in (1, 2, 3, 50):
        counts = sorted((rng.randrange(1, 1000) for _ in range(size)), reverse=True)
        parents, right = _tree(counts)
        depths, reached = np.zeros(2 * size - 1, int), sorted(counts)
        for node in range(2 * size - 3, -1, -1):
            depths[node] = depths[parents[node]] + 1
        cost = 0
        while len(reached) > 1:
            cost += reached[0] + reached[1]
            reached = sorted([reached[0] + reached[1], *reached[2:]])
        assert (np.array(counts) * depths[:size]).sum() == cost
        assert right[: 2 * size - 2].sum() == size - 1


@pytest.mark.peer
@pytest.mark.parametrize("loss", ["softmax", "hs", "ova", "ns"])
@pytest.mark.parametrize("subwords", [(0, 0), (2, 4)])
@pytest.mark.parametrize("quantise", [None, {}, {"cutoff": 300, "qnorm": True}, {"qout": True, "qnorm": True}])
def test_scores_are_fasttexts_own(loss, subwords, quantise, tmp_path):
    if not PEER.exists():
        pytest.skip("fastText is not installed: make test-all does it")
    more_labels = 297 if quantise and "qout" in quantise else 0  # 256 are the least that can be quantised
    minn, maxn = subwords
    train = {"loss": loss, "lr": 0.1, "dim": 10, "bucket": 975, "wordNgrams": 3, "minn": minn, "maxn": maxn}
    out = tmp_path / "peer.model"
    arguments = json.dumps([str(out), more_labels, train, quantise, TEXTS])
    done = subprocess.run([PEER, "-c", PEER_SCRIPT, arguments], capture_output=True, text=True, check=True)
    model = FastText.load(out)
    expected = np.array([[each.get(label, 0) for label in model.labels] for each in json.loads(done.stdout)])
    assert model.labels[:3] == LABELS and len(model.labels) == 3 + more_labels
    assert (len(model.inputs.codes) > 0, len(model.outputs.codes) > 0) == (quantise is not None, more_labels > 0)
    check(said(model, TEXTS), expected)
