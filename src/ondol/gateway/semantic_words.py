"""Word lists of the guards, English and Korean: what turns one question into another.

Tables only.  Latin entries are whole words; Korean ones are looked for inside words, since Korean joins endings.
"""

from __future__ import annotations

from typing import Final

# Each line is one contrast; poles are split by `|`, words of one pole by blanks (`_` stands for a blank).
OPPOSITES: Final = """
cancel cancels cancelled canceled cancelling canceling revoke withdraw_from|activate activated activating order ordered book booked subscribe confirm confirmed apply
activate activated activating|deactivate deactivated deactivating block blocked freeze frozen
enable enabled enabling|disable disabled disabling
open opened opening opens|close closed closing closes
start started starting starts begin begins|stop stopped stopping stops end ends ended
increase increased increasing raise raised higher up|decrease decreased decreasing reduce reduced lower down
buy buying bought purchase|sell selling sold
send sent sending|receive received receiving
deposit deposited depositing|withdraw withdrew withdrawn withdrawing withdrawal withdrawals
add added adding|remove removed removing delete deleted
install installed installing|uninstall uninstalled uninstalling
lock locked locking|unlock unlocked unlocking
connect connected connecting|disconnect disconnected disconnecting
allow allowed allowing permit permitted|forbid forbidden prohibit prohibited deny denied refuse refused
accept accepted accepting|reject rejected rejecting decline declined declining
encrypt encrypted encrypting|decrypt decrypted decrypting
upload uploaded uploading|download downloaded downloading
import imported importing imports|export exported exporting exports
before|after
with|without
can|cannot
inside|outside
always|never
all every everything everyone everybody each entire whole|some several few any|none nothing nobody
모든 모두 전부 전체|일부 몇몇 약간
more|less fewer
most|least
maximum max highest|minimum min lowest
best|worst
cheap cheaper cheapest|expensive
early earlier earliest|late later latest
old older oldest|new newer newest
first|last
left|right
true|false
legal lawful|illegal unlawful
safe|unsafe dangerous
possible|impossible
win won|lose lost
arrive arrived arriving arrival|depart departed departing departure
husband|wife
father dad|mother mum mom
brother|sister
son|daughter
male man men boy boys|female woman women girl girls
hot hotter|cold colder
turn_on switch_on|turn_off switch_off
취소 철회|신청 예약 등록 주문
활성화|비활성화
켜 켤 켠 켰|끄 꺼 끌 껐
열어 열고 여는 열리 열까 열려 열었 개점 개장|닫아 닫고 닫는 닫히 닫을 닫혀 닫았 폐점 폐장
시작|종료 중단 중지 끝나 끝내
올려 올리 올릴 높여 높이 상승 인상 증가|내려 내리 내릴 낮춰 낮추 하락 인하 감소
사고_ 구매 매수 사는|파는 팔고 판매 매도
보내 발신 송신|받아 받은 받는 수신
입금|출금 인출
추가|삭제 제거 지워 지우 지웠
설치|제거
잠그 잠금 잠가|잠금_해제 풀어
연결|해제 끊어 끊는
허용 허가|금지 차단 불허
수락 승인 동의|거절 거부 반려
암호화|복호화
업로드|다운로드
수입|수출
출발|도착
가입|탈퇴 해지
입학|졸업
입사|퇴사
결혼|이혼
이전_에 전에|이후_에 후에
안에 내부|밖에 외부
있어 있나 있는 있을 있니 있습|없어 없나 없는 없을 없니 없습
많이 많은 많아 많고 많았 많나|적게 적은 적어 적고 적었
최대 최고|최소 최저
비싼 비싸|싼_ 저렴
빨리 빠른 일찍|천천히 느린 늦게
오래된 낡은|새로운 최신
왼쪽|오른쪽
위쪽|아래쪽
찬성|반대
성공|실패
합격|불합격 탈락
남자 남성 남편 소년 남친 아들 아버지 아빠 형_ 오빠|여자 여성 아내 소녀 여친 딸_ 어머니 엄마 언니 누나
좋아 좋은 좋네 좋다|싫어 싫은 싫네 싫다
사랑|이별 헤어
더운 더워 덥|추운 추워 춥
"""

QUESTIONS: Final = {
    "who": "who whose whom 누구 누가 누굴",
    "when": "when 언제 몇시 몇_시 며칠 몇일",
    "where": "where 어디 어딜 어느_곳",
    "why": "why 왜 이유 어째서",
    "many": "how_many how_much 얼마 몇_개 몇_명 몇개 몇명",
    "long": "how_long how_soon",
}

DAYS: Final = {
    "mon": "monday mondays 월요일", "tue": "tuesday tuesdays 화요일", "wed": "wednesday wednesdays 수요일",
    "thu": "thursday thursdays 목요일", "fri": "friday fridays 금요일", "sat": "saturday saturdays 토요일",
    "sun": "sunday sundays 일요일", "weekend": "weekend weekends 주말", "weekday": "weekday weekdays 평일",
    "today": "today tonight 오늘 금일", "tomorrow": "tomorrow 내일 명일", "yesterday": "yesterday 어제 어젯 작일",
    "after tomorrow": "모레", "before yesterday": "그제 그저께",
    "january": "january", "february": "february", "march": "march", "april": "april", "june": "june", "july": "july",
    "august": "august", "september": "september", "october": "october", "november": "november", "december": "december",
    "this week": "this_week 이번_주 이번주 금주", "next week": "next_week 다음_주 다음주 차주",
    "last week": "last_week 지난_주 지난주", "this month": "this_month 이번_달 이번달",
    "next month": "next_month 다음_달 다음달", "last month": "last_month 지난_달 지난달 저번_달",
    "this year": "this_year 올해 금년", "next year": "next_year 내년 다음_해", "last year": "last_year 작년 지난해",
    "spring": "봄에 봄철", "summer": "summer 여름", "autumn": "autumn 가을", "winter": "winter 겨울",
    "morning": "morning 아침 오전", "noon": "noon lunchtime 점심 정오", "evening": "evening 저녁",
    "afternoon": "afternoon 오후", "night": "night midnight 한밤 심야 자정", "dawn": "dawn 새벽",
}  # fmt: skip

PLACES: Final = {
    "korea": "korea korean 한국 대한민국", "north korea": "북한 조선민주", "japan": "japan japanese 일본",
    "china": "china chinese 중국", "usa": "usa america american 미국", "uk": "uk britain british england english 영국",
    "france": "france french 프랑스", "germany": "germany german 독일", "italy": "italy italian 이탈리아",
    "spain": "spain spanish 스페인", "russia": "russia russian 러시아", "india": "india indian 인도_ 인도의 인도는",
    "canada": "canada canadian 캐나다", "mexico": "mexico mexican 멕시코", "brazil": "brazil brazilian 브라질",
    "australia": "australia australian 호주", "vietnam": "vietnam vietnamese 베트남", "thailand": "thailand thai 태국",
    "taiwan": "taiwan 대만", "hong kong": "hong_kong 홍콩", "singapore": "singapore 싱가포르 싱가폴",
    "indonesia": "indonesia 인도네시아", "philippines": "philippines 필리핀", "malaysia": "malaysia 말레이시아",
    "turkey": "türkiye 터키", "egypt": "egypt 이집트", "israel": "israel 이스라엘", "iran": "iran 이란",
    "iraq": "iraq 이라크", "syria": "syria 시리아", "ukraine": "ukraine 우크라이나", "pakistan": "pakistan 파키스탄",
    "poland": "poland polish 폴란드", "sweden": "sweden 스웨덴", "norway": "norway 노르웨이", "swiss": "switzerland 스위스",
    "netherlands": "netherlands dutch 네덜란드", "europe": "europe european eu 유럽", "asia": "asia 아시아_",
    "africa": "africa 아프리카", "seoul": "seoul 서울", "busan": "busan 부산", "incheon": "incheon 인천",
    "daegu": "daegu 대구", "daejeon": "daejeon 대전", "gwangju": "gwangju 광주", "ulsan": "ulsan 울산",
    "sejong": "sejong 세종시", "jeju": "jeju 제주", "suwon": "suwon 수원", "gangneung": "강릉", "jeonju": "전주_",
    "gangnam": "gangnam 강남", "pyongyang": "평양", "tokyo": "tokyo 도쿄", "osaka": "osaka 오사카",
    "beijing": "beijing 베이징 북경", "shanghai": "shanghai 상하이", "new york": "new_york 뉴욕", "london": "london 런던",
    "paris": "paris 파리_", "berlin": "berlin 베를린", "rome": "rome 로마", "madrid": "madrid 마드리드",
    "moscow": "moscow 모스크바", "washington": "washington 워싱턴", "los angeles": "los_angeles",
    "chicago": "chicago 시카고", "boston": "boston 보스턴", "sydney": "sydney 시드니", "toronto": "toronto 토론토",
    "dubai": "dubai 두바이", "bangkok": "bangkok 방콕", "hanoi": "hanoi 하노이",
}  # fmt: skip

AMOUNTS: Final = {
    "half": "half 절반 반만",
    "twice": "twice double 두_배 두배",
    "only": "only 오직 오로지",
    "at least": "at_least 이상 적어도 최소한",
    "at most": "at_most up_to 이하 많아야",
    "above": "above exceed 초과 넘는 보다_많 보다_큰",
    "below": "below 미만 보다_적 보다_작",
}
"""Words that change how many, and are never said without meaning it."""

MONEY: Final = {
    "usd": "dollar dollars usd $ 달러", "eur": "euro euros eur € 유로", "gbp": "pound pounds gbp £ 파운드",
    "jpy": "yen jpy ¥ 엔화", "krw": "won krw ₩ 원화", "cny": "yuan cny rmb 위안", "btc": "bitcoin btc 비트코인",
}  # fmt: skip

COLOURS: Final = {
    "red": "red 빨간 빨강 붉은", "blue": "blue 파란 파랑 푸른", "green": "green 초록 녹색", "black": "black 검은 검정 까만",
    "white": "white 하얀 흰_ 흰색 하양", "yellow": "yellow 노란 노랑", "orange": "orange 오렌지 주황", "grey": "grey gray 회색",
    "brown": "brown 갈색", "pink": "pink 분홍 핑크", "purple": "purple 보라색",
}  # fmt: skip

UNITS: Final = {
    "second": "s sec secs second seconds 초", "minute": "min mins minute minutes 분", "hour": "h hr hrs hour hours 시간",
    "o'clock": "o'clock 시", "am": "am a.m", "pm": "pm p.m", "day": "day days 일 일간 하루", "night": "박",
    "week": "week weeks 주 주일 주간", "month": "month months 개월 달", "month name": "월", "year": "year years 년 년간",
    "age": "살 세", "gram": "g gram grams 그램", "kilo": "kg kilo kilos kilogram kilograms 킬로 킬로그램",
    "metre": "m metre metres meter meters 미터", "km": "km kilometre kilometres kilometer kilometers 킬로미터",
    "cm": "cm 센티 센티미터", "mm": "mm 밀리", "mile": "mile miles 마일", "inch": "inch inches 인치", "feet": "ft foot feet 피트",
    "litre": "l litre litres liter liters 리터", "ml": "ml 밀리리터", "percent": "% percent pct 퍼센트 프로",
    "celsius": "°c celsius 섭씨 도", "fahrenheit": "°f fahrenheit 화씨", "usd": "$ dollar dollars usd 달러 불",
    "eur": "€ euro euros eur 유로", "gbp": "£ pound pounds gbp 파운드", "krw": "₩ won krw 원", "jpy": "¥ yen jpy 엔",
    "mb": "mb megabyte megabytes 메가", "gb": "gb gigabyte gigabytes 기가", "tb": "tb terabyte terabytes 테라",
    "kb": "kb kilobyte kilobytes", "times": "times 번 회 배", "person": "people persons person 명 인 사람", "piece": "개",
    "floor": "층", "place": "위 등", "class": "학년", "sheet": "장", "cup": "잔", "animal": "마리", "book": "권", "car": "대",
}  # fmt: skip
